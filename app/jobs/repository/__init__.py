"""Every SQL statement about jobs, and every change of a job's status.

Each transition is one guarded UPDATE: it names the state it leaves and the lease token of the
claim, so whoever comes second changes nothing and learns it (`LeaseLost`). All times are the
database's.
"""

from app.jobs.repository.client import ClientSide
from app.jobs.repository.ledger import Ledger
from app.jobs.repository.owner import OwnerSide
from app.jobs.repository.records import Claim, Lease, NewJob, Orphan, Outputs, QueueStats
from app.jobs.repository.retention import RetentionSide
from app.jobs.repository.statements import MAX_CRASHES, SUBMIT_WINDOW_SECONDS
from app.jobs.repository.sweep import SweepSide

__all__ = [
    "MAX_CRASHES",
    "SUBMIT_WINDOW_SECONDS",
    "Claim",
    "JobRepository",
    "Lease",
    "NewJob",
    "Orphan",
    "Outputs",
    "QueueStats",
]


class JobRepository(ClientSide, OwnerSide, Ledger, SweepSide, RetentionSide):
    """The jobs of the database, from every side."""
