"""What each command is told in words: a parser for each, none of which imports torch, so that help is there at once."""
