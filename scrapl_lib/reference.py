"""The method in its plainest form, as the paper prints it: slow and short. Tests hold the fast code to it."""

# ---- P-Adam and P-SAGA ----------------------------------------------------------------------------------------------


def p_adam(w, gradient, draws, P, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """P-Adam (Algorithm 1, eq. 6 to 8): yields the weights after each step.

    w: the weights, an array. gradient(p, w): gradient of path p's loss at w. draws: the path of each step, in [0, P).
    """
    b1, b2 = betas
    m, v, tau = {}, {}, {}  # of the paths drawn so far
    for k, p in enumerate(draws, start=1):
        g = gradient(p, w)
        a = (k - tau.get(p, 0)) / P
        m[p] = b1**a * m.get(p, 0) + (1 - b1**a) * g  # eq. 6
        v[p] = b2**a * v.get(p, 0) + (1 - b2**a) * g * g  # eq. 7
        m_hat, v_hat = m[p] / (1 - b1 ** (k / P)), v[p] / (1 - b2 ** (k / P))
        tau[p] = k
        w = w - lr * weight_decay * w - lr * m_hat / (eps + v_hat**0.5)  # eq. 8
        yield w


def p_saga(w, gradient, draws, P, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """P-SAGA (Algorithm 1, eq. 6 to 9): yields the weights after each step. Arguments as in `p_adam`."""
    b1, b2 = betas
    m, v, tau, ghat, Gamma = {}, {}, {}, {}, set()  # ghat: the update that a path gave when it was drawn last
    for k, p in enumerate(draws, start=1):
        g = gradient(p, w)
        a = (k - tau.get(p, 0)) / P
        m[p] = b1**a * m.get(p, 0) + (1 - b1**a) * g  # eq. 6
        v[p] = b2**a * v.get(p, 0) + (1 - b2**a) * g * g  # eq. 7
        g_cur = m[p] / (1 - b1 ** (k / P)) / (eps + (v[p] / (1 - b2 ** (k / P))) ** 0.5)  # eq. 8
        tau[p] = k
        mean = sum(ghat[q] for q in Gamma) / max(1, len(Gamma))
        w = w - lr * weight_decay * w - lr * (g_cur - ghat.get(p, 0) + mean)  # eq. 9
        ghat[p] = g_cur
        Gamma.add(p)
        yield w
