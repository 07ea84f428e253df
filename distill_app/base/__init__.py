"""The bundled teacher and the students' starting points, as ordinary checkpoints."""
