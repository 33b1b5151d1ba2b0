-- Removes rows of roost.workers: a master's own at its end, and those of its dead predecessors at its start.
-- Called by: the master. Locks: the rows.
DELETE FROM roost.workers WHERE id = ANY (%(ids)s::uuid[])
