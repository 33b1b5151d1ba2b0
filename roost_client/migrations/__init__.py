"""The numbered SQL files of the schema; a package, so that an installation carries them. Read by roost_client.schema."""
