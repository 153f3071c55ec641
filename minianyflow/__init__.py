"""minianyflow: any-step generation, from two dimensions to Wan2.1, through one function u(z, t, r).

The files beside this one are the mathematics: begin with notation, interpolant, flow_map. README.md has the folders.

The public names are below. `from minianyflow import rollout` imports its module alone; `import minianyflow` needs
nothing but Python.
"""

from importlib import import_module

__version__ = "0.1.0"

_NAMES = {  # by module
    "interpolant": "broadcast_time clean_from_velocity data_velocity interpolate score_from_velocity",
    "times": "draw_pairs generator time_grid time_shift",
    "flow_map": "displace end_point jump rollout tangent velocity",
    "samplers": "sample_consistency sample_consistency_deterministic sample_euler sample_flow_map sample_ode",
    "mixtures": "GaussianMixture",
    "guidance": "Guidance guided",
    "objectives": "FLOW_MAPS FlowMapLoss eulerian_target lagrangian_target semigroup_target teacher_step_target",
    "consistency": "ConsistencyLoss consistency_target",
    "on_policy": "FakeScoreLoss OnPolicyLoss backward_simulation backward_simulation_times distribution_matching_loss "
    "draw_on_policy draw_rollouts",
    "measures": "even_noise frechet_distance off_share path_error sliced_w2 sobol_noise",
    "batch": "Batch batches",
    "training": "Role train",
    "networks.mlp": "EvaluationCounter MLP",
    "support.errors": "InputError",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    """Import a public name from its module, when it is first used (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
