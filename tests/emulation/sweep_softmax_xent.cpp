// Sweeps softmax_xent: forward and backward, also in place, and both at once, with and without room for a row.
#include "sweep.h"

namespace {

enum Way { kApart, kInPlace, kAtOnce, kAtOnceWithoutRoom };

// N rows of V elements, `offset` elements into a buffer that ends with the last one, rows `apart` apart. What lies
// between rows must stay as it is.
void sweep(Element e, int64_t N, int64_t V, int64_t apart, int64_t offset, Way way,
           int64_t ignore = -100) {
  const bool in_place = way != kApart, at_once = way >= kAtOnce;
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
    y[n] = n == 1 ? ignore : n == 2 ? V : n == 3 ? V - 1 : n == 4 ? -1 : n == 5 ? 0 : int64_t(random() % V);
    dloss[n] = 0.5f + float(n);
    for (int64_t v = 0; v < V; v++) {
      char* at = x + (n * apart + v) * e.size();
      e.write(at, normal(random));
      if (at_once && n == 1 && v == V / 2) e.write(at, NAN);  // an ignored row has gradient 0 whatever it holds
      values[n * V + v] = e.read(at);
    }
  }
  static const int room = emu::shared_limit;
  emu::shared_limit = way == kAtOnceWithoutRoom ? 0 : room;
  if (at_once)
    fastlm::cuda::softmax_xent_({loss.get(), lse.get(), x, apart, dloss.get(), y.get(), N, V, ignore, e.dtype},
                                nullptr);
  else
    fastlm::cuda::softmax_xent_fwd({loss.get(), lse.get(), x, apart, y.get(), N, V, ignore, e.dtype}, nullptr);
  char* dx = in_place ? x : gradient.get();
  const int64_t dx_apart = in_place ? apart : V;
  if (!at_once)
    fastlm::cuda::softmax_xent_bwd({dx, dx_apart, dloss.get(), x, apart, y.get(), lse.get(), N, V, ignore, e.dtype},
                                   nullptr);
  for (int64_t n = 0; n < N; n++) {
    double m = -INFINITY, s = 0;
    for (int64_t v = 0; v < V; v++) m = std::max(m, values[n * V + v]);
    for (int64_t v = 0; v < V; v++) s += std::exp(values[n * V + v] - m);
    const double true_lse = m + std::log(s);
    const bool ignored = y[n] == ignore, outside = !ignored && (y[n] < 0 || y[n] >= V);
    if (!(at_once && ignored)) expect(near(lse[n], true_lse, 2e-6), "lse", {V, n});
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
    for (int64_t i = V * e.size(); n + 1 < N && i < apart * e.size(); i++)
      expect(x[n * apart * e.size() + i] == 0x7f, "element behind a row", {V, n, i});
  }
}

}  // namespace

int main(int argc, char** argv) {
  const bool whole = argc > 1 && std::strcmp(argv[1], "whole") == 0;
  for (const Element& e : {kF32, kBF16, kF16}) {
    for (int64_t V : {1, 2, 5, 37, 64, 127, 1031, 4109})
      for (int64_t offset : {0, 1, 3})
        for (Way way : {kApart, kInPlace, kAtOnce, kAtOnceWithoutRoom})
          sweep(e, 6, V, V + offset, offset, way, offset == 3 ? V / 2 : -100);
    sweep(e, 3, 8193, 8193, 0, kApart);
    for (Way way : {kAtOnce, kAtOnceWithoutRoom}) sweep(e, 1, 17000, 17000, 1, way);  // kAhead vectors of every thread
    if (whole)
      for (Way way : {kInPlace, kAtOnce, kAtOnceWithoutRoom}) sweep(e, 3, 50257, 50304, 1, way);
  }
  return wrong ? 1 : 0;
}
