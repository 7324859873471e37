// Written by make_tables.py; do not edit.
#pragma once

namespace ppkernels {

// The mantissa m in [1, 2) falls into interval i = floor(16·(m - 1)); kInverse[i] is
// about 1 / (middle of the interval), and kLogHi[i] + kLogLo[i] = -log2(kInverse[i]).
// kLogHi is a multiple of 2^-15, so that adding an integer exponent to it is exact.
alignas(64) constexpr float kInverse[16] = {
    0x1.f07c200000000p-1f, 0x1.d41d420000000p-1f, 0x1.bacf920000000p-1f, 0x1.a41a420000000p-1f,
    0x1.8f9c180000000p-1f, 0x1.7d05f40000000p-1f, 0x1.6c16c20000000p-1f, 0x1.5c98820000000p-1f,
    0x1.4e5e0a0000000p-1f, 0x1.4141420000000p-1f, 0x1.3521d00000000p-1f, 0x1.29e4120000000p-1f,
    0x1.1f70480000000p-1f, 0x1.15b1e60000000p-1f, 0x1.0c97140000000p-1f, 0x1.0410420000000p-1f,
};
alignas(64) constexpr float kLogHi[16] = {
    0x1.6b80000000000p-5f, 0x1.08c0000000000p-3f, 0x1.acf0000000000p-3f, 0x1.2440000000000p-2f,
    0x1.6e20000000000p-2f, 0x1.b478000000000p-2f, 0x1.f7a8000000000p-2f, 0x1.1bf0000000000p-1f,
    0x1.3ab8000000000p-1f, 0x1.5848000000000p-1f, 0x1.74b0000000000p-1f, 0x1.900c000000000p-1f,
    0x1.aa70000000000p-1f, 0x1.c3e8000000000p-1f, 0x1.dc88000000000p-1f, 0x1.f45c000000000p-1f,
};
alignas(64) constexpr float kLogLo[16] = {
    0x1.69021e0000000p-16f, 0x1.61ee2a0000000p-17f, 0x1.778ac00000000p-17f, 0x1.e5b6da0000000p-20f,
    0x1.103a920000000p-17f, 0x1.aff3f80000000p-16f, 0x1.50d21c0000000p-20f, 0x1.89b8e40000000p-16f,
    0x1.a053f60000000p-16f, 0x1.0597ac0000000p-20f, 0x1.fcac360000000p-17f, 0x1.3174340000000p-16f,
    0x1.1df7580000000p-18f, 0x1.ca17040000000p-17f, 0x1.9d687e0000000p-17f, 0x1.02f8ae0000000p-16f,
};
// Their sum, rounded once.
alignas(64) constexpr float kLog[16] = {
    0x1.6bad200000000p-5f, 0x1.08c5880000000p-3f, 0x1.acf5de0000000p-3f, 0x1.24407a0000000p-2f,
    0x1.6e22200000000p-2f, 0x1.b47ec00000000p-2f, 0x1.f7a8540000000p-2f, 0x1.1bf3140000000p-1f,
    0x1.3abb400000000p-1f, 0x1.5848200000000p-1f, 0x1.74b1fc0000000p-1f, 0x1.900e620000000p-1f,
    0x1.aa708e0000000p-1f, 0x1.c3e9ca0000000p-1f, 0x1.dc899e0000000p-1f, 0x1.f45e060000000p-1f,
};

// log2(1 + r) ~ r·(c0 + c1·r + ...), |r| <= 0.0303: error 2^-32.8.
alignas(64) constexpr float kLogPoly[5] = {
    0x1.7154760000000p+0f, -0x1.7154740000000p-1f, 0x1.ec82300000000p-2f, -0x1.719f2e0000000p-2f,
    0x1.e4947a0000000p-3f,
};
// The same, shorter: error 2^-24.2.
alignas(64) constexpr float kShortLogPoly[3] = {
    0x1.7154760000000p+0f, -0x1.7178a80000000p-1f, 0x1.ecb4060000000p-2f,
};

// 2^(i/16).
alignas(64) constexpr double kExp[16] = {
    0x1.0000000000000p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0,
    0x1.2387a6e756238p+0, 0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0,
    0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0, 0x1.6a09e667f3bcdp+0,
    0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
    0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0,
    0x1.ea4afa2a490dap+0,
};

// 2^g - 1 ~ g·(d0 + d1·g + ...), |g| <= 0.0313: error 2^-29.2.
alignas(64) constexpr float kExpPoly[3] = {
    0x1.62e4300000000p-1f, 0x1.ebfffc0000000p-3f, 0x1.c6ae0c0000000p-5f,
};
// The same, shorter: error 2^-21.2.
alignas(64) constexpr float kShortExpPoly[2] = {
    0x1.62e9860000000p-1f, 0x1.ebfffc0000000p-3f,
};

}  // namespace ppkernels
