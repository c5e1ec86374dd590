// The switch between two stacks, and the first frame of a new stack. Only the registers that a
// called function must preserve are saved: the switch is an ordinary call for the compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Saves the current stack pointer to *saved and continues on the stack `target` was saved from.
extern "C" void simt_switch(void** saved, void* target);

#if defined(__x86_64__)
asm(R"(
  .pushsection .text.simt_switch,"axG",@progbits,simt_switch,comdat
  .weak simt_switch
  .type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size simt_switch,.-simt_switch
  .popsection
)");
#elif defined(__aarch64__)
asm(R"(
  .pushsection .text.simt_switch,"axG",%progbits,simt_switch,comdat
  .weak simt_switch
  .type simt_switch,%function
simt_switch:
  sub sp,sp,#176
  stp x19,x20,[sp]
  stp x21,x22,[sp,#16]
  stp x23,x24,[sp,#32]
  stp x25,x26,[sp,#48]
  stp x27,x28,[sp,#64]
  stp x29,x30,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp]
  ldp x21,x22,[sp,#16]
  ldp x23,x24,[sp,#32]
  ldp x25,x26,[sp,#48]
  ldp x27,x28,[sp,#64]
  ldp x29,x30,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  add sp,sp,#176
  ret
  .size simt_switch,.-simt_switch
  .popsection
)");
#else
#error "simt: no context switch for this processor"
#endif

namespace simt {

// Writes the frame from which the first switch to a stack ending at `top` enters `entry`, which
// must never return. Returns the stack pointer to switch to.
inline void* first_frame(char* top, void (*entry)()) {
  auto* frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
#if defined(__x86_64__)
  constexpr int kSavedRegisters = 6;
  // The slot of entry's return address also gives the alignment that a call would have left.
  frame -= kSavedRegisters + 2;
  memset(frame, 0, (kSavedRegisters + 2) * sizeof(void*));
  frame[kSavedRegisters] = reinterpret_cast<void*>(entry);
#else
  constexpr int kFrameSlots = 22;
  constexpr int kLinkRegister = 11;
  frame -= kFrameSlots;
  memset(frame, 0, kFrameSlots * sizeof(void*));
  frame[kLinkRegister] = reinterpret_cast<void*>(entry);
#endif
  return frame;
}

}  // namespace simt
