#!/bin/bash
# Installs what the virtual cluster of these tests needs: SLURM, its authentication, and namespaces with networks.
set -euo pipefail

packages=(slurm-wlm munge iproute2 procps)
missing=()
for command in slurmctld slurmd munged sbatch ip nsenter unshare pkill; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("$command")
done
if [ "$(id -u)" -ne 0 ]; then
    echo "The tests on the virtual cluster start daemons in namespaces of their own, for which they need root:" >&2
    echo "run \`make test-cluster\` as root, in a container or on a machine that you may throw away." >&2
    exit 1
fi
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "The tests on the virtual cluster need ${missing[*]}, and there is no apt-get to install them with:" >&2
    echo "install your system's packages of SLURM (with its daemons), munge, iproute2, util-linux and procps." >&2
    exit 1
fi
# tzdata asks questions otherwise
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
if ! unshare --mount --uts --pid --net --fork true; then
    echo "This container may not make namespaces; start it with the capability SYS_ADMIN (docker run --privileged)." >&2
    exit 1
fi
