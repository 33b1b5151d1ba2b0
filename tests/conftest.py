"""What every test may ask for: a PostgreSQL server and fresh databases on it."""
