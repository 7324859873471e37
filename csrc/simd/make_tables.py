"""Computes csrc/simd/tables.h: the tables and polynomials of log2 and exp2.

    python csrc/simd/make_tables.py > csrc/simd/tables.h

Needs mpmath. The construction, with the errors that the printed comments repeat, is described in
csrc/simd/README.md.
"""

from __future__ import annotations

import struct

from mpmath import cos, log, lu_solve, matrix, mp, mpf, pi

mp.prec = 200

INTERVALS = 16


def single(x: mpf) -> mpf:
    """x rounded to float32."""
    return mpf(struct.unpack("f", struct.pack("f", float(x)))[0])


def fit(f, bound: mpf, terms: int) -> list[mpf]:
    """float32 coefficients c with x·Σ c_k x^k ≈ f(x) on |x| <= bound, absolute error near minimax.

    Interpolates f(x)/x in Chebyshev nodes weighted by x (odd count of nodes would hit 0, so f is
    divided analytically by evaluating off 0), rounds the leading coefficient and fits the rest to
    what is left, so that each rounding is absorbed by the coefficients after it.
    """
    coefficients: list[mpf] = []
    while len(coefficients) < terms:
        count = terms - len(coefficients)
        # Least squares in many Chebyshev points: near-minimax, and smooth in x = 0.
        points = [bound * cos(pi * (2 * j + 1) / 400) for j in range(200)]
        done = len(coefficients)
        rest = [
            f(x) - sum((c * x ** (k + 1) for k, c in enumerate(coefficients)), mpf(0))
            for x in points
        ]
        basis = [[x ** (done + k + 1) for k in range(count)] for x in points]
        normal = matrix(count, count)
        right = matrix(count, 1)
        for row, value in zip(basis, rest, strict=True):
            for a in range(count):
                right[a] += row[a] * value
                for b in range(count):
                    normal[a, b] += row[a] * row[b]
        coefficients.append(single(lu_solve(normal, right)[0]))
    return coefficients


def largest_error(f, bound: mpf, coefficients: list[mpf]) -> mpf:
    points = [bound * (mpf(j) / 2000 - 1) for j in range(4001)]
    return max(
        abs(f(x) - sum(c * x ** (k + 1) for k, c in enumerate(coefficients))) for x in points
    )


def literal(x: mpf) -> str:
    return f"{float(x).hex()}f"


def array(name: str, kind: str, values: list[str]) -> str:
    lines = [f"alignas(64) constexpr {kind} {name}[{len(values)}] = {{"]
    per_line = 4 if kind == "float" else 3
    for start in range(0, len(values), per_line):
        lines.append("    " + ", ".join(values[start : start + per_line]) + ",")
    return "\n".join([*lines, "};"])


def main() -> None:
    inverse, log_hi, log_lo = [], [], []
    reach = mpf(0)
    for i in range(INTERVALS):
        center = 1 + (mpf(i) + mpf(1) / 2) / INTERVALS
        c = single(1 / center)
        exact = -log(c, 2)
        hi = mpf(int(exact * 2**15)) / 2**15
        inverse.append(c)
        log_hi.append(hi)
        log_lo.append(single(exact - hi))
        for edge in (mpf(i), mpf(i + 1)):
            reach = max(reach, abs((1 + edge / INTERVALS) * c - 1))

    def log2_1p(r):
        return log(1 + r, 2)

    def exp2_m1(g):
        return mpf(2) ** g - 1

    log_poly = fit(log2_1p, reach, 5)
    # A little more than half of 1/16: the low part of the exponent may push g over the edge.
    exp_reach = mpf(1) / 2 / INTERVALS * (1 + mpf(2) ** -10)
    exp_poly = fit(exp2_m1, exp_reach, 3)

    print("// Written by make_tables.py; do not edit.")
    print("#pragma once")
    print()
    print("namespace ppkernels {")
    print()
    print("// The mantissa m in [1, 2) falls into interval i = floor(16·(m - 1)); kInverse[i] is")
    print("// about 1 / (middle of the interval), and kLogHi[i] + kLogLo[i] = -log2(kInverse[i]).")
    print("// kLogHi is a multiple of 2^-15, so that adding an integer exponent to it is exact.")
    print(array("kInverse", "float", [literal(x) for x in inverse]))
    print(array("kLogHi", "float", [literal(x) for x in log_hi]))
    print(array("kLogLo", "float", [literal(x) for x in log_lo]))
    print("// Their sum, rounded once.")
    sums = [single(a + b) for a, b in zip(log_hi, log_lo, strict=True)]
    print(array("kLog", "float", [literal(x) for x in sums]))
    print()
    error = float(log(largest_error(log2_1p, reach, log_poly), 2))
    print(f"// log2(1 + r) ~ r·(c0 + c1·r + ...), |r| <= {float(reach):.4f}: error 2^{error:.1f}.")
    print(array("kLogPoly", "float", [literal(x) for x in log_poly]))
    short_log_poly = fit(log2_1p, reach, 3)
    error = float(log(largest_error(log2_1p, reach, short_log_poly), 2))
    print(f"// The same, shorter: error 2^{error:.1f}.")
    print(array("kShortLogPoly", "float", [literal(x) for x in short_log_poly]))
    print()
    print("// 2^(i/16).")
    exp_table = [float(mpf(2) ** (mpf(i) / INTERVALS)).hex() for i in range(INTERVALS)]
    print(array("kExp", "double", exp_table))
    print()
    error = float(log(largest_error(exp2_m1, exp_reach, exp_poly), 2))
    print(f"// 2^g - 1 ~ g·(d0 + d1·g + ...), |g| <= {float(exp_reach):.4f}: error 2^{error:.1f}.")
    print(array("kExpPoly", "float", [literal(x) for x in exp_poly]))
    short_exp_poly = fit(exp2_m1, exp_reach, 2)
    error = float(log(largest_error(exp2_m1, exp_reach, short_exp_poly), 2))
    print(f"// The same, shorter: error 2^{error:.1f}.")
    print(array("kShortExpPoly", "float", [literal(x) for x in short_exp_poly]))
    print()
    print("}  // namespace ppkernels")


if __name__ == "__main__":
    main()
