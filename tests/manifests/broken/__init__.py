"""Every rule, broken: a table for each theme of rules/."""

from manifests.broken import commands, jobs, mesh, pods, references, schemas, secrets

BROKEN = [
    *commands.BROKEN,
    *jobs.BROKEN,
    *mesh.BROKEN,
    *pods.BROKEN,
    *references.BROKEN,
    *schemas.BROKEN,
    *secrets.BROKEN,
]
