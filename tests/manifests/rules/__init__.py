"""One theme per file, one function per rule: what is built -> findings."""

from manifests.rules import (
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

RULES = (
    *schemas.RULES,
    *pods.RULES,
    *rights.RULES,
    *gpus.RULES,
    *rollouts.RULES,
    *references.RULES,
    *services.RULES,
    *mesh.RULES,
    *access.RULES,
    *jobs.RULES,
    *commands.RULES,
    *secrets.RULES,
)
