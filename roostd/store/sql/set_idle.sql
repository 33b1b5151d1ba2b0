-- Says for which queues this worker wants notifications; none: it finds new jobs by polling.
-- Called by: the master when that changes, before the claim that would otherwise miss a job. Locks: its own row (unlogged, HOT).
INSERT INTO roost.idle_workers AS i (worker_id, idle, queues)
VALUES (%(worker_id)s::uuid, cardinality(%(queues)s::text[]) > 0, %(queues)s::text[])
ON CONFLICT (worker_id) DO UPDATE SET idle = excluded.idle, queues = excluded.queues
