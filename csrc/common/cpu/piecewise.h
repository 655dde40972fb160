// GELU and the logistic sigmoid with AVX-512: polynomials of low degree on 32 intervals, whose coefficients a permutation
// of two registers looks up. That takes fewer instructions than an exponential. Included by vec_math.h, which says how far
// off they are.
//
// Coefficients are fits of our own (tools/fit_vec_math.py).
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace mirage::cpu::MIRAGE_ISA {
namespace piecewise {

// cdf(-a) around a = i * kTailStep, by powers of the distance. The last constant is 0: what lies beyond is cut off.
constexpr float kTailStep = 0.17578125f, kTailEnd = 31 * kTailStep;
alignas(64) constexpr float kTail[5][32] = {
    {0.5f, 0.430232912f, 0.36258319f, 0.298977435f, 0.240988925f, 0.189726055f, 0.14578414f, 0.109260812f,
     0.0798249543f, 0.0568212196f, 0.0393897071f, 0.0265815482f, 0.0174561124f, 0.0111518335f, 0.00692872517f,
     0.00418561045f, 0.00245790114f, 0.00140275632f, 0.000777916925f, 0.000419127697f, 0.000219360096f,
     0.000111508802f, 5.50488912e-05f, 2.63893307e-05f, 1.22830252e-05f, 5.55060251e-06f, 2.43498789e-06f,
     1.03691343e-06f, 4.28594973e-07f, 1.71942347e-07f, 6.69459723e-08f, 0.0f},
    {-0.398942083f, -0.392826021f, -0.3750346f, -0.347154796f, -0.311570078f, -0.271124691f, -0.228751048f,
     -0.18712759f, -0.148420274f, -0.114137769f, -0.0851032585f, -0.0615238696f, -0.0431242697f, -0.029307615f,
     -0.0193116702f, -0.0123378569f, -0.00764258439f, -0.00459009083f, -0.00267290068f, -0.00150912383f,
     -0.00082612806f, -0.000438480492f, -0.000225649099f, -0.000112589347f, -5.44679824e-05f, -2.5548512e-05f,
     -1.16190377e-05f, -5.12336055e-06f, -2.19038202e-06f, -9.07956235e-07f, -3.64913603e-07f, -1.42198573e-07f},
    {-3.32180572e-14f, 0.0345256701f, 0.0659239516f, 0.0915348306f, 0.109536216f, 0.119146444f, 0.120630302f,
     0.115127221f, 0.104357943f, 0.0902847201f, 0.0747977793f, 0.0594810992f, 0.0454826578f, 0.0334862769f,
     0.0237624459f, 0.0162657686f, 0.0107474169f, 0.00685826736f, 0.00422863243f, 0.00252013304f, 0.00145218801f,
     0.000809311285f, 0.000436317758f, 0.00022760006f, 0.000114894829f, 5.61376655e-05f, 2.65517465e-05f,
     1.21581979e-05f, 5.39050507e-06f, 2.31427839e-06f, 9.62199692e-07f, 3.87446875e-07f},
    {0.0663941726f, 0.0633591264f, 0.0547117591f, 0.0417296886f, 0.026248822f, 0.0103038065f, -0.00423917593f,
     -0.015975222f, -0.0241219699f, -0.0285353176f, -0.0296019055f, -0.0280564129f, -0.0247790366f, -0.0206199735f,
     -0.016279161f, -0.0122492928f, -0.00881305709f, -0.00607722718f, -0.00402368745f, -0.00256145094f,
     -0.00156952941f, -0.000926534412f, -0.000527327065f, -0.000289527263f, -0.000153430767f, -7.85124648e-05f,
     -3.88088301e-05f, -1.85365625e-05f, -8.55770486e-06f, -3.81964219e-06f, -1.64861956e-06f, -6.8823249e-07f},
    {5.73443636e-12f, -0.00852351356f, -0.0157679543f, -0.020720277f, -0.0228292029f, -0.0220816452f, -0.0189523548f,
     -0.0142467739f, -0.00889519043f, -0.00375335757f, 0.00054257497f, 0.00364321028f, 0.00547723006f,
     0.00618789019f, 0.0060439934f, 0.00535345729f, 0.00439700019f, 0.00339042488f, 0.00247308146f, 0.0017151892f,
     0.0011350743f, 0.000718641153f, 0.000436152099f, 0.000254140847f, 0.000142350094f, 7.6722572e-05f,
     3.98226439e-05f, 1.99195256e-05f, 9.60780562e-06f, 4.470779e-06f, 2.00790737e-06f, 8.70700489e-07f},
};

// cdf(x) around x = k * kCdfStep for k from -16 to 15, at k modulo 32, by powers of x itself; 0 and 1 at the two ends.
constexpr float kCdfStep = 0.28125f, kCdfLow = -16 * kCdfStep, kCdfHigh = 15 * kCdfStep;
alignas(64) constexpr float kCdf[3][32] = {
    {0.5f, 0.498892814f, 0.491724074f, 0.481427282f, 0.48088631f, 0.505019128f, 0.560670435f, 0.642042637f,
     0.73411268f, 0.820441008f, 0.88980639f, 0.938507974f, 0.968762696f, 0.985536695f, 0.993888617f, 1.0f, 0.0f,
     0.00235943333f, 0.00611139322f, 0.0144632887f, 0.031237334f, 0.0614920147f, 0.110193603f, 0.179559007f,
     0.26588735f, 0.357957333f, 0.439329594f, 0.494980842f, 0.51911366f, 0.518572748f, 0.508275926f, 0.501107216f},
    {0.397958815f, 0.412752479f, 0.447157443f, 0.47728008f, 0.479217559f, 0.44166562f, 0.369961321f, 0.280907243f,
     0.19342041f, 0.120964244f, 0.068838954f, 0.0357122719f, 0.0169166587f, 0.00732729165f, 0.0029056014f, 0.0f,
     0.0f, 0.00105597544f, 0.0029056014f, 0.00732729165f, 0.0169166587f, 0.0357122719f, 0.068838954f, 0.120964244f,
     0.19342041f, 0.280907243f, 0.369961321f, 0.44166562f, 0.479217559f, 0.47728008f, 0.447157443f, 0.412752479f},
    {-9.19734039e-15f, -0.0536025167f, -0.095257014f, -0.117344297f, -0.118757322f, -0.104138143f, -0.081025891f,
     -0.056648761f, -0.0358582661f, -0.0206507482f, -0.0108560966f, -0.00522194756f, -0.00230235956f,
     -0.000931691844f, -0.000346399465f, 0.0f, 0.0f, 0.000118426193f, 0.000346399465f, 0.000931691844f,
     0.00230235956f, 0.00522194756f, 0.0108560966f, 0.0206507482f, 0.0358582661f, 0.056648761f, 0.081025891f,
     0.104138143f, 0.118757322f, 0.117344297f, 0.095257014f, 0.0536025167f},
};

// 1 / (1 + e^-x), in the same way.
constexpr float kSigmoidStep = 0.5625f, kSigmoidLow = -16 * kSigmoidStep, kSigmoidHigh = 15 * kSigmoidStep;
alignas(64) constexpr float kSigmoid[3][32] = {
    {0.5f, 0.497576296f, 0.487891197f, 0.492743015f, 0.533002853f, 0.60406214f, 0.687076092f, 0.765622318f,
     0.831287801f, 0.882075131f, 0.919384778f, 0.94583267f, 0.964102149f, 0.976477861f, 0.984733343f, 1.0f, 0.0f,
     0.00982784014f, 0.0152666727f, 0.0235221554f, 0.0358978435f, 0.0541673526f, 0.0806152299f, 0.117924854f,
     0.168712214f, 0.234377697f, 0.312923938f, 0.39593789f, 0.466997147f, 0.507256985f, 0.512108803f, 0.502423704f},
    {0.248772934f, 0.265471071f, 0.28987956f, 0.284171581f, 0.24368605f, 0.18746905f, 0.133583575f, 0.0904124752f,
     0.0591334887f, 0.0377928615f, 0.0237701144f, 0.0147792287f, 0.00911025144f, 0.00557823619f, 0.00339715322f,
     0.0f, 0.0f, 0.00205959473f, 0.00339715322f, 0.00557823619f, 0.00911025144f, 0.0147792287f, 0.0237701144f,
     0.0377928615f, 0.0591334887f, 0.0904124752f, 0.133583575f, 0.18746905f, 0.24368605f, 0.284171581f, 0.28987956f,
     0.265471071f},
    {2.03167205e-16f, -0.0312262643f, -0.0466946997f, -0.0450864956f, -0.034893062f, -0.0237631444f, -0.0150128212f,
     -0.00907800533f, -0.00535184285f, -0.00310941972f, -0.00179152703f, -0.00102728419f, -0.000587452145f,
     -0.000335411693f, -0.00019133676f, 0.0f, 0.0f, 0.000109093497f, 0.00019133676f, 0.000335411693f,
     0.000587452145f, 0.00102728419f, 0.00179152703f, 0.00310941972f, 0.00535184285f, 0.00907800533f, 0.0150128212f,
     0.0237631444f, 0.034893062f, 0.0450864956f, 0.0466946997f, 0.0312262643f},
};

// x * scale rounded to an integer, in the low bits.
MIRAGE_INLINE Vec<float> round_to_index(Vec<float> x, float scale) { return x * scale + 12582912.0f; }

MIRAGE_INLINE Vec<float> look_up(const float (&table)[32], Vec<float> index) {
  return (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
}

// Horner's rule with coefficients of each lane's interval.
template <int N, int M>
MIRAGE_INLINE void piecewise_each(const Vec<float> (&index)[N], const Vec<float> (&x)[N], const float (&c)[M][32],
                                  Vec<float> (&p)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = look_up(c[M - 1], index[i]);
#pragma GCC unroll 8
  for (int k = M - 2; k >= 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + look_up(c[k], index[i]);
  }
}

// The smaller and the larger of two, the second where either is NaN.
MIRAGE_INLINE Vec<float> least(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
MIRAGE_INLINE Vec<float> greatest(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }

// max(x, 0) - |x| cdf(-|x|). |x| is infinite for -inf only, where the product is NaN; -0 keeps its sign.
template <int N>
MIRAGE_INLINE void gelu_each(Vec<float> (&x)[N]) {
  Vec<float> b[N], index[N], t[N], tail[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    b[i] = (Vec<float>)((IVec<float>)least(splat(kTailEnd), x[i]) & 0x7fffffff);
    const Vec<float> a = least(splat(kTailEnd), b[i]);
    index[i] = round_to_index(a, 1 / kTailStep);
    t[i] = a - (index[i] - 12582912.0f) * kTailStep;
  }
  piecewise_each(index, t, kTail, tail);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = greatest(splat(-0.0f), x[i]) - b[i] * tail[i];
}

// x cdf(x), with the cdf of the nearest end beyond the table: 0 times -inf is NaN.
template <int N>
MIRAGE_INLINE void coarse_gelu_each(Vec<float> (&x)[N]) {
  Vec<float> a[N], index[N], cdf[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    a[i] = greatest(least(x[i], splat(kCdfHigh)), splat(kCdfLow));
    index[i] = round_to_index(a[i], 1 / kCdfStep);
  }
  piecewise_each(index, a, kCdf, cdf);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] *= cdf[i];
}

// 1 / (1 + e^-x), 0 and 1 beyond the table.
template <int N>
MIRAGE_INLINE void coarse_sigmoid_each(Vec<float> (&x)[N]) {
  Vec<float> a[N], index[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    a[i] = least(splat(kSigmoidHigh), greatest(splat(kSigmoidLow), x[i]));
    index[i] = round_to_index(a[i], 1 / kSigmoidStep);
  }
  piecewise_each(index, a, kSigmoid, x);
}

}  // namespace piecewise
}  // namespace mirage::cpu::MIRAGE_ISA
