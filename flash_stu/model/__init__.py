"""The model: its configuration, its transformers classes, its layers, and directories that hold one."""
