"""Matmuls and their collectives, cut into chunks and pipelined: schedules, transports, the planner between them."""
