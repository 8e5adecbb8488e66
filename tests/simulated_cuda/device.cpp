// A CUDA device whose memory is the host's: real numbers, no card.
//
// A torch that was built without CUDA keeps CUDA's dispatch key, but nothing answers to it. Here an allocator,
// a device guard, the hooks and a fallback are registered for it. The fallback runs every operator by the
// host's implementation over the same memory, and refuses operands that lie on both sides, as CUDA does.
//
// What is watched, and told to a listener: every time the host would wait for the card ("wait"), every copy
// from the host to the card ("upload"), every mixture of devices ("mixed"). Memory is counted, filled with NaN
// before it is handed out, and limited on request.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;

const c10::Device card(c10::DeviceType::CUDA, 0);

typedef void (*Listener)(const char* kind, const char* what);
std::atomic<Listener> listener{nullptr};

void tell(const char* kind, const std::string& what) {
  if (Listener listen = listener) listen(kind, what.c_str());
}

// ---- memory of the card: counted, limited, full of NaN -------------------------------------------------

std::atomic<int64_t> in_use{0}, most_in_use{0}, limit{std::numeric_limits<int64_t>::max()};

struct Block {
  void* start;
  int64_t size;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use -= block->size;
  free(block->start);
  delete block;
}

struct CardMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    const int64_t size = (static_cast<int64_t>(asked) + 511) / 512 * 512;  // as CUDA's allocator rounds
    if (in_use + size > limit) {
      C10_THROW_ERROR(OutOfMemoryError, "CUDA out of memory. Tried to allocate " + std::to_string(asked) + " bytes (simulated)");
    }
    void* start = nullptr;
    if (size && posix_memalign(&start, 512, size)) throw std::bad_alloc();
    if (size) memset(start, 0xFF, size);
    in_use += size;
    int64_t seen = most_in_use;
    while (in_use > seen && !most_in_use.compare_exchange_weak(seen, in_use)) {
    }
    return {start, new Block{start, size}, free_block, card};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free_block; }
  void copy_data(void* to, const void* from, std::size_t size) const override { memcpy(to, from, size); }
} card_memory;

// ---- pinned memory of the host: what the card reads and writes while nobody waits ----------------------

std::mutex pinned_lock;
std::map<const char*, int64_t> pinned;  // start -> size

void free_pinned(void* start) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  pinned.erase(static_cast<const char*>(start));
  free(start);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t asked) override {
    void* start = nullptr;
    const size_t size = asked ? asked : 1;
    if (posix_memalign(&start, 64, size)) throw std::bad_alloc();
    std::lock_guard<std::mutex> hold(pinned_lock);
    pinned[static_cast<const char*>(start)] = static_cast<int64_t>(size);
    return {start, start, free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free_pinned; }
  void copy_data(void* to, const void* from, std::size_t size) const override { memcpy(to, from, size); }
} pinned_memory;

bool is_pinned(const void* place) {
  std::lock_guard<std::mutex> hold(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(place));
  if (after == pinned.begin()) return false;
  auto block = std::prev(after);
  return static_cast<const char*>(place) < block->first + block->second;
}

// ---- what torch asks of a device: one card, one stream, everything done at once -------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return card; }
  c10::Device getDevice() const override { return card; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, card); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void* place) const override { return is_pinned(place); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Allocator* getCUDADeviceAllocator() const override { return &card_memory; }
  // The host's own generator: what is drawn on the card is what the host would draw.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// ---- every operator, by the host's implementation -------------------------------------------------------

// The same memory under the host's name; keeps `t` alive.
Tensor on_host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  const auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  return at::from_blob(t.numel() ? t.mutable_data_ptr() : nullptr, t.sizes(), t.strides(), [keep = t](void*) {}, options);
}

// A copy on the card of what the host's implementation has made.
Tensor on_card(const Tensor& t) {
  if (!t.defined() || !t.is_cpu()) return t;
  Tensor copy = at::detail::empty_strided_generic(t.sizes(), t.strides(), &card_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), t.scalar_type());
  if (t.numel()) on_host(copy).copy_(t);
  return copy;
}

// What CUDA lets mix: indices on the host are uploaded, and some operators copy by themselves.
bool may_mix(const std::string& name) {
  static const std::set<std::string> named{"aten::copy_", "aten::_amp_update_scale_", "aten::set_.source_Tensor"};
  return named.count(name) || name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put_impl_", 0) == 0;
}

// Operators whose result has a value or a size that the host must know.
bool needs_an_answer(const std::string& name) {
  static const std::set<std::string> named{
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::is_nonzero"};
  return named.count(name) > 0;
}

// The arguments of one call on their way to the host's implementation and back.
struct Call {
  const std::string& name;
  bool on_card = false, on_host_too = false;
  std::string stranger;                                    // the first argument that is on the host
  std::unordered_map<c10::TensorImpl*, Tensor> originals;  // host's view -> tensor of the card
  std::vector<std::pair<Tensor, Tensor>> outs;             // empty `out` arguments, which get their size later

  Tensor translate(const Tensor& t, const std::string& argument) {
    if (!t.defined()) return t;
    if (t.is_cuda()) {
      on_card = true;
      const bool is_out = t.numel() == 0 && argument.rfind("out", 0) == 0;
      Tensor view = is_out ? at::empty({0}, t.options().device(at::kCPU)) : on_host(t);
      if (is_out) outs.emplace_back(view, t);
      originals[view.unsafeGetTensorImpl()] = t;
      return view;
    }
    if (t.is_cpu() && t.dim() > 0 && !on_host_too) {  // a number, of no dimensions, may come from anywhere
      on_host_too = true;
      stranger = argument;
    }
    return t;
  }

  void translate(c10::IValue& value, const std::string& argument) {
    if (value.isTensor()) {
      value = translate(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = translate(t, argument);
      value = c10::IValue(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& t : value.toOptionalTensorList().vec()) {
        const bool counts_the_mask = name.find("index_put") != std::string::npos;  // index itself asks for nonzero
        if (counts_the_mask && t && t->defined() && t->is_cuda() && t->scalar_type() == at::kBool) tell("wait", name + " by a mask");
        if (t && t->defined() && t->is_cpu() && t->dim() > 0) tell("wait", name + " by an index on the host");
        list.push_back(t ? std::optional<Tensor>(translate(*t, argument)) : t);
      }
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = c10::Device(at::kCPU);
    }
  }

  Tensor give_back(const Tensor& t) const {
    const auto found = t.defined() ? originals.find(t.unsafeGetTensorImpl()) : originals.end();
    return found == originals.end() ? ::on_card(t) : found->second;
  }

  void give_back(c10::IValue& value) const {
    if (value.isTensor()) {
      value = give_back(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = give_back(t);
      value = c10::IValue(list);
    }
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string name = schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  const size_t arguments = schema.arguments().size(), first = stack->size() - arguments;
  Call call{name};
  for (size_t i = 0; i < arguments; i++) call.translate((*stack)[first + i], schema.arguments()[i].name());
  if (call.on_card && call.on_host_too && !may_mix(name)) {
    tell("mixed", name + ", " + call.stranger);
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but argument ", call.stranger, " of ", name, " is on cpu and others on cuda:0 (simulated)");
  }
  if (needs_an_answer(name)) tell("wait", name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [made, asked] : call.outs) {
    asked.resize_(made.sizes());
    if (made.numel()) on_host(asked).copy_(made);
  }
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) call.give_back((*stack)[i]);
}

// ---- what the fallback cannot do: making tensors, and views of the card's own memory ---------------------

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &card_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &card_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const bool down = self.is_cpu() && source.is_cuda(), up = self.is_cuda() && source.is_cpu();
  if (up && source.numel()) tell("upload", "copy to the card");
  if ((down || up) && self.numel()) {
    const void* host = down ? self.const_data_ptr() : source.const_data_ptr();
    if (!non_blocking) {
      tell("wait", down ? "copy to the host" : "copy to the card");
    } else if (!is_pinned(host)) {
      tell("wait", down ? "copy to the host, whose memory is not pinned" : "copy to the card from memory that is not pinned");
    }
  }
  if (self.numel() || source.numel()) on_host(self).copy_(on_host(source));
  return self;
}

}  // namespace

namespace c10 {
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &card_memory);
}
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  using Sizes = c10::IntArrayRef;
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("view", [](const Tensor& t, Sizes size) { return at::native::view(t, size); });
  library.impl("as_strided", [](const Tensor& t, Sizes size, Sizes stride, std::optional<int64_t> offset) { return at::native::as_strided_tensorimpl(t, size, stride, offset); });
  library.impl("_reshape_alias", [](const Tensor& t, Sizes size, Sizes stride) { return at::native::_reshape_alias(t, size, stride); });
  library.impl("unfold", [](const Tensor& t, int64_t dim, int64_t size, int64_t step) { return at::native::unfold(t, dim, size, step); });
  library.impl("resize_", [](const Tensor& t, Sizes size, std::optional<at::MemoryFormat> format) -> const Tensor& { return at::native::resize_(t, size, format); });
  library.impl("set_.source_Storage", [](Tensor& t, at::Storage source) -> Tensor& { return at::native::set_(t, source); });
  library.impl("set_.source_Storage_storage_offset", [](Tensor& t, at::Storage source, int64_t offset, Sizes size, Sizes stride) -> Tensor& { return at::native::set_storage_cpu_(t, source, offset, size, stride); });
  library.impl("set_.source_Tensor", [](Tensor& t, const Tensor& source) -> Tensor& { return at::native::set_tensor_(t, source); });
}

extern "C" {
int64_t card_bytes_in_use() { return in_use; }
int64_t card_most_bytes() { return most_in_use; }
void card_forget_the_most() { most_in_use = in_use.load(); }
void card_limit(int64_t bytes) { limit = bytes; }
void card_listener(Listener listen) { listener = listen; }
}
