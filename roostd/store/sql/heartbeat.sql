-- Keeps a master alive to its peers, and tells it what a lost notification may have kept from it: a reload or drain
-- request, the paused queues, and which of its jobs are to be cancelled; and the database's time. No row: it was declared dead.
-- Called by: the master's heartbeat, on a connection of its own. Locks: its own row (a HOT update).
-- Scans queues (a row a queue ever paused); claims only where cancels are asked for, by sequential scan of what runs now.
UPDATE roost.workers AS w
   SET last_seen_at = now(), inflight = %(inflight)s::integer, queues = %(queues)s::text[],
       concurrency = %(concurrency)s::integer, metadata = w.metadata || %(metadata)s::jsonb
 WHERE w.id = %(id)s::uuid
RETURNING w.reload_request, w.drain_requested,
          ARRAY(SELECT q.name FROM roost.queues q WHERE q.paused) AS paused,
          ARRAY(SELECT c.job_id FROM roost.claims c WHERE c.worker_id = w.id AND c.cancel_requested) AS cancelled,
          now()
