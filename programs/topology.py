"""Devices that are not there, to compile real TPU programs for (extra `aot`: libtpu)."""

import os

import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

HOSTS = {  # four chips, or four pairs of cores, by generation
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
AXES = ROWS, HEADS = "data", "tensor"  # of the meshes here: what is split over them
# Without these libtpu looks for a machine's metadata server, prints and locks.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(topology: str) -> np.ndarray:
    """The devices of a slice that is not there, such as "v5e:4x4"."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return np.array(found.devices)


def chip(generation: str) -> Mesh:
    """One device of a generation as a mesh of data 1 x tensor 1."""
    return _mesh(devices(HOSTS[generation])[:1].reshape(1, 1))


def host(generation: str) -> Mesh:
    """A host of four chips as a mesh: data 2 x tensor 2, or 4 where a chip is two devices."""
    return _mesh(devices(HOSTS[generation]).reshape(2, -1))


def _mesh(chips: np.ndarray) -> Mesh:
    return Mesh(chips, AXES, axis_types=(AxisType.Auto,) * 2)
