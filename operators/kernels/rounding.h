/* Rounding to bfloat16 and float16, and the sums of operators/rounding.py over a range: of e e, w w
 * and e w for e = x - origin and w = written - origin, and how many e and w are not 0. */

#ifndef ROUNDING_H
#define ROUNDING_H

#include <math.h>

#include "selection.h"

#define PART static inline __attribute__((always_inline))

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A bfloat16 as the float of the same value. */
static inline float widened(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* The bfloat16 nearest to a finite float, ties to even; returns the same number as a float. */
PART float to_bfloat16(uint32_t bits, uint16_t *written) {
    const uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
    *written = (uint16_t)(nearest >> 16);
    return float_of(nearest & 0xffff0000);
}

/* The same for float16. Its numbers below 2^-14 have a spacing of 2^-24, like the floats from 0.5
 * on, so that adding 0.5 rounds to them. */
PART float to_float16(uint32_t bits, uint16_t *written) {
    const uint32_t own = magnitude_of(bits), sign = bits ^ own;
    const uint32_t nearest = own + 0xfff + (own >> 13 & 1);
    const float small = float_of(own) + 0.5f;
    const int is_small = own < 0x38800000;
    const uint32_t half = is_small ? bits_of(small) - 0x3f000000 : (nearest >> 13) - (112 << 10);
    *written = (uint16_t)(half | sign >> 16);
    return float_of(sign | (is_small ? bits_of(small - 0.5f) : nearest & 0xffffe000));
}

typedef double Doubles __attribute__((vector_size(32)));
enum { WIDTH = 4, PARTS = 4, LANES = WIDTH * PARTS }; /* of the sums; they fit the registers */

typedef struct {
    uint32_t largest; /* magnitude */
    int64_t num_e, num_w;
    Doubles ee[PARTS], ww[PARTS], ew[PARTS];
} Rounding;

/* Rounds up to BLOCK numbers; e and w: what they and the written ones are beside the origin. */
PART void round_part(int length, const float *x, int is_brain, const void *origin,
                     int origin_is_half, uint16_t *restrict written, float *restrict e,
                     float *restrict w, Rounding *sums) {
    uint32_t largest = sums->largest;
    int32_t num_e = 0, num_w = 0;
    for (int i = 0; i < length; i++) {
        const uint32_t bits = bits_of(x[i]), magnitude = magnitude_of(bits);
        const float value = (is_brain ? to_bfloat16 : to_float16)(bits, written + i);
        largest = magnitude > largest ? magnitude : largest;
        if (!origin) continue;
        const float start =
            origin_is_half ? widened(((const uint16_t *)origin)[i]) : ((const float *)origin)[i];
        e[i] = x[i] - start;
        w[i] = value - start;
        num_e += e[i] != 0.0f;
        num_w += w[i] != 0.0f;
    }
    sums->largest = largest;
    sums->num_e += num_e;
    sums->num_w += num_w;
}

static inline Doubles in_double(const float *x) { return (Doubles){x[0], x[1], x[2], x[3]}; }

/* sum + x * y. Products of floats are exact in double, so fused or not, the bits are the same. */
static inline Doubles with_product(Doubles sum, Doubles x, Doubles y) {
#ifdef __FP_FAST_FMA
    for (int i = 0; i < WIDTH; i++) sum[i] = fma(x[i], y[i], sum[i]);
    return sum;
#else
    return sum + x * y;
#endif
}

/* Adds the products of e and w, which have zeros up to a multiple of LANES. */
static void add_products(int length, const float *e, const float *w, Rounding *sums) {
    Rounding own = *sums;
    for (int i = 0; i < length; i += LANES)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const Doubles x = in_double(e + i + WIDTH * part), y = in_double(w + i + WIDTH * part);
            own.ee[part] = with_product(own.ee[part], x, x);
            own.ww[part] = with_product(own.ww[part], y, y);
            own.ew[part] = with_product(own.ew[part], x, y);
        }
    *sums = own;
}

#endif
