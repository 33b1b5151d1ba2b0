-- Removes the wishes of workers that are gone. Called by: the reaper, and a master at its end. Scans idle_workers, a few rows.
DELETE FROM roost.idle_workers
 WHERE NOT EXISTS (SELECT 1 FROM roost.workers w WHERE w.id = idle_workers.worker_id)
