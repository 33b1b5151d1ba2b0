"""The bytes that travel between master, template and children. Standard library only, never pickle."""
