// Sweeps softmax_xent, forward and backward, also in place.
#include "sweep.h"

namespace {

constexpr int64_t kIgnore = -100;

// N rows of V elements, `offset` elements into a buffer that ends with the last one, rows `apart` apart.
void sweep(Element e, int64_t N, int64_t V, int64_t apart, int64_t offset, bool in_place) {
  const int64_t elements = offset + (N - 1) * apart + V;
  std::unique_ptr<char[]> buffer(new char[elements * e.size()]), gradient(new char[N * V * e.size()]);
  std::unique_ptr<int64_t[]> y(new int64_t[N]);
  std::unique_ptr<float[]> loss(new float[N]), lse(new float[N]), dloss(new float[N]);
  std::mt19937 random(int(V + apart + offset));
  std::normal_distribution<double> normal(0, 3);
  char* x = buffer.get() + offset * e.size();
  std::memset(buffer.get(), 0x7f, elements * e.size());
  std::vector<double> values(N * V);
  for (int64_t n = 0; n < N; n++) {
    y[n] = n == 1 ? kIgnore : n == 2 ? V : int64_t(random() % V);
    dloss[n] = 0.5f + float(n);
    for (int64_t v = 0; v < V; v++) {
      char* at = x + (n * apart + v) * e.size();
      e.write(at, normal(random));
      values[n * V + v] = e.read(at);
    }
  }
  fastlm::cuda::softmax_xent_fwd({loss.get(), lse.get(), x, apart, y.get(), N, V, kIgnore, e.dtype}, nullptr);
  char* dx = in_place ? x : gradient.get();
  const int64_t dx_apart = in_place ? apart : V;
  fastlm::cuda::softmax_xent_bwd({dx, dx_apart, dloss.get(), x, apart, y.get(), lse.get(), N, V, kIgnore, e.dtype},
                                 nullptr);
  for (int64_t n = 0; n < N; n++) {
    double m = -INFINITY, s = 0;
    for (int64_t v = 0; v < V; v++) m = std::max(m, values[n * V + v]);
    for (int64_t v = 0; v < V; v++) s += std::exp(values[n * V + v] - m);
    const double true_lse = m + std::log(s);
    expect(near(lse[n], true_lse, 2e-6), "lse", {V, n});
    const bool ignored = y[n] == kIgnore, outside = y[n] >= V;
    if (ignored) expect(loss[n] == 0, "loss of an ignored row", {V, n});
    else if (outside) expect(std::isnan(loss[n]), "loss of a wrong label", {V, n});
    else expect(near(loss[n], true_lse - values[n * V + y[n]], 4e-6), "loss", {V, n});
    for (int64_t v = 0; v < V; v++) {
      const double got = e.read(dx + (n * dx_apart + v) * e.size());
      const double wanted = (std::exp(values[n * V + v] - true_lse) - (v == y[n])) * dloss[n];
      if (ignored) expect(got == 0, "dx of an ignored row", {V, n, v});
      else if (outside) expect(std::isnan(got), "dx of a wrong label", {V, n, v});
      else expect(near(got, wanted, e.tolerance), "dx", {V, n, v});
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = argc > 1 && std::strcmp(argv[1], "whole") == 0;
  for (const Element& e : {kF32, kBF16, kF16}) {
    for (int64_t V : {1, 2, 5, 37, 127, 1031, 4109})
      for (int64_t offset : {0, 1, 3})
        for (bool in_place : {false, true}) sweep(e, 4, V, V + offset, offset, in_place);
    sweep(e, 3, 8193, 8193, 0, false);
    if (whole) sweep(e, 3, 50257, 50304, 1, true);
  }
  return wrong ? 1 : 0;
}
