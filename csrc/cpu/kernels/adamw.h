// AdamW (Loshchilov and Hutter 2019) in one pass, in the order of operations of torch.optim.AdamW.

template <class T, class C, bool kCopy>
inline void adamw_range(const AdamW& a, int64_t begin, int64_t end) {
  const T* grad = static_cast<const T*>(a.grad);
  C* copy = static_cast<C*>(a.copy);
  const Floats decay = Floats::set(a.decay), scale = Floats::set(a.grad_scale), eps = Floats::set(a.eps);
  const Floats one_minus_beta1 = Floats::set(a.one_minus_beta1);
  const Floats beta2 = Floats::set(a.beta2), one_minus_beta2 = Floats::set(a.one_minus_beta2);
  const Floats inv_sqrt_bias2 = Floats::set(a.inv_sqrt_bias2), step_size = Floats::set(-a.step_size);
  columns<Floats::N>(begin, end, [&](int64_t j, auto tag) MLM_LAMBDA {
    const Floats g = load(grad + j, tag) * scale;
    Floats m = load(a.exp_avg + j, tag), v = load(a.exp_avg_sq + j, tag);
    m = fma(g - m, one_minus_beta1, m);
    v = fma(v, beta2, g * g * one_minus_beta2);
    const Floats denominator = fma(sqrt(v), inv_sqrt_bias2, eps);
    const Floats p = fma(m / denominator, step_size, load(a.master + j, tag) * decay);
    store(a.exp_avg + j, m, tag);
    store(a.exp_avg_sq + j, v, tag);
    store(a.master + j, p, tag);
    if (kCopy) store(copy + j, p, tag);
  });
}

template <class T>
void adamw(const AdamW& a, int64_t begin, int64_t end) {
  if (!a.copy) return adamw_range<T, float, false>(a, begin, end);
  if (a.copy_dtype == kBFloat16) return adamw_range<T, bf16, true>(a, begin, end);
  if (a.copy_dtype == kHalf) return adamw_range<T, f16, true>(a, begin, end);
  adamw_range<T, float, true>(a, begin, end);
}
