"""What the daemon asks of the database: one SQL statement a file in sql/, one function for each in statements.py."""
