/* Writes $MARK to descriptor 9, started as a program, as a script's interpreter or as an ELF interpreter. */
#define SYS_WRITE 1L
#define SYS_EXIT_GROUP 231L

static long call(long number, long first, const void *second, long third)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(first), "S"(second), "d"(third)
			 : "rcx", "r11", "memory");
	return result;
}

__attribute__((used)) static void start(const char **stack)
{
	const char **environment = stack + 1 + (long)stack[0] + 1;

	for (; *environment; environment++) {
		const char *word = *environment;
		long size = 5;

		if (word[0] != 'M' || word[1] != 'A' || word[2] != 'R' || word[3] != 'K' || word[4] != '=')
			continue;
		while (word[size])
			size++;
		call(SYS_WRITE, 9, word + 5, size - 5);
	}
	call(SYS_EXIT_GROUP, 0, 0, 0);
}

/* The stack begins with argc; no C library, which would not survive being started as a loader. */
__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n");
