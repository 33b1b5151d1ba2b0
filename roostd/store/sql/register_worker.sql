-- Adds a master's row under an id drawn for this start.
-- Called by: the master at start, and again after it was declared dead. Locks: none but its own row. Safe to repeat.
INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, metadata)
VALUES (%(id)s::uuid, %(name)s, %(hostname)s, %(pid)s::integer, %(queues)s::text[], %(concurrency)s::integer, %(metadata)s::jsonb)
ON CONFLICT (id) DO NOTHING
