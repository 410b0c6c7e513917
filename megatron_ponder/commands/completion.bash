# Tab completion of ponder, for bash, and for zsh after `autoload bashcompinit && bashcompinit`. What a command takes is
# asked of its help, once in a shell.
declare -A _ponder_options

_ponder() {
    local word=${COMP_WORDS[COMP_CWORD]} name=${COMP_WORDS[1]} choices=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        choices="COMMANDS --help --version"
    elif [[ $word == -* ]]; then
        if [ -z "${_ponder_options[$name]:-}" ]; then
            _ponder_options[$name]=$(ponder "$name" --help 2> /dev/null | grep -oE -- '--[a-z][a-z0-9_.-]*' | sort -u)
        fi
        choices=${_ponder_options[$name]}
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
}

complete -o default -F _ponder ponder
