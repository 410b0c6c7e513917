"""What every part stands on: how a process starts and ends, errors, files, variables, texts, command lines."""
