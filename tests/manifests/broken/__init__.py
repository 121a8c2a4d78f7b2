"""Every rule, broken: a table for each theme of rules/."""

from manifests.broken import (
    access,
    commands,
    gpus,
    jobs,
    mesh,
    pods,
    references,
    rights,
    rollouts,
    schemas,
    secrets,
    services,
)

BROKEN = [
    *access.BROKEN,
    *commands.BROKEN,
    *gpus.BROKEN,
    *jobs.BROKEN,
    *mesh.BROKEN,
    *pods.BROKEN,
    *references.BROKEN,
    *rights.BROKEN,
    *rollouts.BROKEN,
    *schemas.BROKEN,
    *secrets.BROKEN,
    *services.BROKEN,
]
