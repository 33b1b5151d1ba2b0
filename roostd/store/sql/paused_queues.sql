-- The names of the paused queues. Called by: the master when it is told that a queue changed. Scans queues, a row a queue ever paused.
SELECT q.name FROM roost.queues q WHERE q.paused
