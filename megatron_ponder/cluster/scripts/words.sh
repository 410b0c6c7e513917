# Sourced by the scripts beside it, and by those for mpirun and for one machine.

# words NAME TEXT
#
# Makes an array of the words of a text, such as PYTHON or SRUN_OPTIONS. Words with spaces are in quotes there, as they
# would be on a command line; but nothing in them is expanded or executed.
words() {
    mapfile -d '' -t "$1" < <(xargs -r printf '%s\0' <<< "$2")
    wait "$!" || exit 2 # xargs has said what is wrong
}
