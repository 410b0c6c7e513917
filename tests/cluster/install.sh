#!/bin/bash
# Installs what the tests on the virtual cluster need: SLURM, its authentication, and namespaces with networks.
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
    echo "The virtual cluster starts daemons in namespaces of their own, for which it needs root:" >&2
    echo "run \`make test-cluster\` as root, in a container or on a machine that you may throw away." >&2
    exit 1
fi
missing=()
for command in slurmctld slurmd munged sbatch ip nsenter unshare pkill; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("$command")
done
if [ ${#missing[@]} -gt 0 ] && ! command -v apt-get >/dev/null; then
    echo "The virtual cluster needs ${missing[*]}, and there is no apt-get to install them with:" >&2
    echo "install your system's packages of SLURM (with its daemons), munge, iproute2, util-linux and procps." >&2
    exit 1
fi
if [ ${#missing[@]} -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive # tzdata asks questions otherwise
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 util-linux procps
fi
if ! unshare --mount --uts --pid --net --fork true; then
    echo "This container may not make namespaces; start it with --cap-add SYS_ADMIN or --privileged." >&2
    exit 1
fi
