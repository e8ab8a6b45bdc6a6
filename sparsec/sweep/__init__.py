"""Many passes on one model, cell by cell: what a grid asks for, what each cell gave, and how both are told."""
