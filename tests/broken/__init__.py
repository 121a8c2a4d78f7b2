"""For `ftconvert repository validate`: models as the builders leave them, and the ways to break them, one fault each.

`good.py` builds them, `changes.py` is how one is changed; of the faults a file has those of one file of rules.
"""

from broken import ensembles, every_model, fastertransformer, python_based, tensorrt_llm

CASES = {
    **every_model.CASES,
    **ensembles.CASES,
    **fastertransformer.CASES,
    **tensorrt_llm.CASES,
    **python_based.CASES,
}
