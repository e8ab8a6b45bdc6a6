"""Training under masks: what brings back a pruned model's quality without bringing back a pruned weight."""
