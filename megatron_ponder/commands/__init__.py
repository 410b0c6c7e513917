"""What users type: a module for each command, whose `main` reads its command line and calls one function."""
