"""From a compiled Relax executable to the artifact file, reproducibly."""
