"""What distillation costs: seconds, memory and host syncs of a step, by its parts."""
