"""The numbered SQL files, read by roost_client.schema; a package, so that an installation carries them."""
