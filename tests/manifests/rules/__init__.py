"""One theme per file, one function per rule: what is built -> findings."""

from manifests.rules import commands, jobs, mesh, pods, references, schemas, secrets

RULES = (
    *schemas.RULES,
    *pods.RULES,
    *references.RULES,
    *mesh.RULES,
    *jobs.RULES,
    *commands.RULES,
    *secrets.RULES,
)
