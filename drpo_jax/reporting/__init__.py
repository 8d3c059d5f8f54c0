"""What a report is made of.

runs       workdirs, put into groups that differ in nothing but the seed; curves and bands
charts     what each metric is, and the drawings
highlight  responses with their tokens coloured by weight
"""
