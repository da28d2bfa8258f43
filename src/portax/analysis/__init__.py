"""Analysis without a conversion: inspect, identify, diff, cost, and pages that show plans."""
