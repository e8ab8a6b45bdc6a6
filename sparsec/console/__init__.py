"""What every command shows and takes: tables, progress, options, and the table of the commands."""
