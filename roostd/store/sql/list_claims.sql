-- What the database holds this worker to be running. Called by: the master, to let go of claims whose answer it never got.
-- Scans claims, which hold what runs now.
SELECT c.job_id, c.lease FROM roost.claims c WHERE c.worker_id = %(worker_id)s::uuid
