"""What a run would take, told before it begins: memory, from a graph's shapes and what passes say of themselves."""
