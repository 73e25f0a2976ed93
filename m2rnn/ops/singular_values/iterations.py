"""How many products of matrices cut singular values, and which."""

# The matrix sign: steps of x ← x (a + b x² + c x⁴), which lift a small x by the factor a and lead the others to between
# 0.68 and 1.21. Then steps of x ← x (3 - x²) / 2, which lead them to 1. An eigenvalue that is off the bound by less
# than 3.4445^-24 = 1e-13 may be left there. A step of the inverse square root is worth 2.25, so that 24 reach singular
# values of a thousand times the bound.
LIFT = (3.4445, -4.775, 2.0315)
LIFT_STEPS, SIGN_STEPS, ROOT_STEPS = 24, 7, 24
