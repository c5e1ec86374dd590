// A parameter group's dictionary as dykaf::Options.

#include <array>
#include <utility>

#include "aten/products.h"
#include "aten/torch_compat.h"
#include "bindings/problems.h"

namespace dykaf::bindings {
namespace {

template <typename Value>
Value read(const py::dict& options, const char* name) {
  if (!options.contains(name)) fail(std::string("options['") + name + "']", "a value", "nothing");
  try {
    return py::cast<Value>(options[name]);
  } catch (const py::cast_error&) {
    fail(std::string("options['") + name + "']", "another type",
         py::cast<std::string>(py::repr(options[name])));
  }
}

// The value of an option that not every optimizer has.
template <typename Value>
Value read_or(const py::dict& options, const char* name, Value otherwise) {
  return options.contains(name) ? read<Value>(options, name) : otherwise;
}

template <typename Enum, size_t kNum>
Enum read_name(const py::dict& options, const char* name,
               const std::array<std::pair<const char*, Enum>, kNum>& values) {
  const auto text = read<std::string>(options, name);
  std::string names;
  for (const auto& [candidate, value] : values) {
    if (text == candidate) return value;
    names += (names.empty() ? "'" : ", '") + std::string(candidate) + "'";
  }
  fail(std::string("options['") + name + "']", "one of " + names, "'" + text + "'");
}

// As asked, or by torch's setting for products on the device.
MatmulPrecision read_precision(const py::dict& options, const at::Device& device) {
  const bool follows =
      !options.contains("matmul_precision") || options["matmul_precision"].is_none();
  if (!follows) {
    return read_name(options, "matmul_precision",
                     std::array{std::pair{"highest", MatmulPrecision::kHighest},
                                std::pair{"high", MatmulPrecision::kHigh},
                                std::pair{"medium", MatmulPrecision::kMedium}});
  }
  if (device.is_cpu()) return aten::torch_precision();
  if (!device.is_cuda()) return MatmulPrecision::kHigh;  // torch's own products follow its settings
  const auto rounding = aten::cuda_operand_rounding();
  return rounding == aten::OperandRounding::kTf32       ? MatmulPrecision::kHigh
         : rounding == aten::OperandRounding::kBfloat16 ? MatmulPrecision::kMedium
                                                        : MatmulPrecision::kHighest;
}

}  // namespace

Rate parse_rate(const py::dict& options) {
  return {.lr = read<double>(options, "lr"), .weight_decay = read<double>(options, "weight_decay")};
}

Options parse_options(const py::dict& options, const at::Device& device) {
  const auto betas = read<std::pair<double, double>>(options, "betas");
  return {
      .beta1 = betas.first,
      .beta2 = betas.second,
      .eps = read<double>(options, "eps"),
      .factor_beta = read<double>(options, "factor_beta"),
      .grad_scale = read<double>(options, "grad_scale"),
      .precondition_frequency = read<int64_t>(options, "precondition_frequency"),
      .seed = read<uint64_t>(options, "seed"),
      .integrator = read_name(
          options, "integrator",
          std::array{std::pair{"ksl", Integrator::kKsl}, std::pair{"bug", Integrator::kBug},
                     std::pair{"diagonal", Integrator::kDiagonal},
                     std::pair{"coupled", Integrator::kCoupled}}),
      .init = read_name(options, "init",
                        std::array{std::pair{"identity", Init::kIdentity},
                                   std::pair{"rank_one", Init::kRankOne}}),
      .second_moment = read_name(options, "second_moment",
                                 std::array{std::pair{"full", SecondMoment::kFull},
                                            std::pair{"rank_one", SecondMoment::kRankOne},
                                            std::pair{"factored", SecondMoment::kFactored},
                                            std::pair{"none", SecondMoment::kNone}}),
      .refresh_schedule = read_name(options, "refresh_schedule",
                                    std::array{std::pair{"geometric", RefreshSchedule::kGeometric},
                                               std::pair{"fixed", RefreshSchedule::kFixed}}),
      .rescale_exp_avg_sq = read<bool>(options, "rescale_exp_avg_sq"),
      .precision = read_precision(options, device),
      .basis_rounding = read<std::string>(options, "state_dtype") == "bfloat16" ? 0x1p-9 : 0.0,
      .nesterov = read<bool>(options, "nesterov"),
      .orthogonalize = read<int64_t>(options, "orthogonalize"),
      .exponent = read_or(options, "exponent", 0.0),
      .damping = read_or(options, "damping", 0.0),
      .roots = read_or<std::string>(options, "roots", "tracked") == "exact" ? Roots::kExact
                                                                            : Roots::kTracked,
      .momentum = read_or<std::string>(options, "momentum", "whitened") == "plain"
                      ? Momentum::kPlain
                      : Momentum::kWhitened,
      .graft = read_or(options, "graft", false),
  };
}

}  // namespace dykaf::bindings
