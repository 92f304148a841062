"""A plugin of pytest for NeMo-RL's own tests: its code environment is ours, before they import it."""

import nemo_rl.environments.code_environment as theirs

from midstream.integrations.nemo_rl import CodeEnvironmentActor

theirs.CodeEnvironment = CodeEnvironmentActor
