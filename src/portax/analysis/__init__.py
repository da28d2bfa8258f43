"""Tools that look: inspect, identify, diff, cost, and pages that show plans."""
