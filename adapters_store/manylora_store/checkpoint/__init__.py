"""A PEFT adapter as files: its configuration, its tensors' names and header, its digest."""
