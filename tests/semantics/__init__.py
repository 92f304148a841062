"""The rules of generation, each pinned by tests that are named after it.

``docs/semantics.md`` has the rules; ``test_rule_08_…`` holds rule 8. A file for each of its sections:
``test_tokens`` (1-5), ``test_blocks`` (6-11), ``test_execution`` (12-16, in a real sandbox), ``test_results`` (17-19),
``test_stopping`` (20-21), ``test_batches`` (22-24, through the generator), ``test_resuming`` (25),
``test_other_markups`` and ``test_worked_examples``.
"""
